"""PyTorch's side of `attention`: `python -m scripts._suites.peers.torch_attention`, by a
Python that has PyTorch."""

# pyright: reportMissingImports=false
# PyTorch is not among what is installed for development.

import time

import torch

from ..contexts import Context
from ..protocol import serve


sdpa = torch.nn.functional.scaled_dot_product_attention


class Torch:
    """Three forms: the one for grouped queries; the same with the queries of a key head as
    rows of one product; and a copy of the pages, made contiguous, before the faster. Where
    lengths differ, one call a sequence of the faster: a mask would have it read all."""

    def versions(self):
        return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}

    def prepare(self, **shape):
        case = Context(**shape)
        data = case.data()
        dtype = getattr(torch, case.dtype)
        q, k, v = (torch.from_numpy(x).to(dtype) for x in (data.q, data.k, data.v))
        pools = [torch.from_numpy(x).to(dtype) for x in data.pools()]
        table = torch.from_numpy(data.table[:, : case.pages_used]).long()
        folded = q.view(case.num_seqs, case.num_kv_heads, -1, case.head_dim)

        def gathered(pool):
            pages = pool[table].transpose(1, 2)
            return pages.reshape(case.num_seqs, case.num_kv_heads, -1, case.head_dim)

        def by_row():
            ends = [(slice(i, i + 1), int(n)) for i, n in enumerate(data.lens)]
            return torch.cat([sdpa(folded[i], k[i, :, :n], v[i, :, :n]) for i, n in ends])

        self._sides = {
            "torch sdpa gqa": lambda: sdpa(q[:, :, None], k, v, enable_gqa=True),
            "torch sdpa folded": lambda: sdpa(folded, k, v),
            "torch gather + sdpa": lambda: sdpa(folded, *map(gathered, pools)),
        }
        if case.ragged:
            self._sides = {"torch sdpa by row": by_row}
        shape = (case.num_seqs, case.num_heads, case.head_dim)
        return {
            name: run().float().reshape(shape)[:1].tolist()
            for name, run in self._sides.items()
        }

    def time(self, side):
        start = time.perf_counter()
        self._sides[side]()
        return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(Torch())
