from .api import write_kv as write_kv
