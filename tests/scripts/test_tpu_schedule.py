import pytest


# In the format of the dump, with one delay slot. Bundles 2 to 16 are the loop over blocks,
# with two branches: 5 to 9, with a loop of its own, and 12 to 14. Around it, from 1 to 19,
# is the loop over rows.
LISTING = """\
= control target key start
LB: loop body
PF: predicated region fallthrough
= control target key end

     0   :  { %1 = vsyncpa [#allocation3], 0  ;;  %s9 = smov 8 /* materialized; not
vmatmul.mubr.bf16.mxu0 %v1 */ }
   0x1 LB: > { %s1_s2 = sphi %s3_s2, %s4_s2  }
   0x2 LB: >> { %s5_s6 = sphi %s7_s6, %s8_s6  }
   0x3   : >> { %19 = sbr.rel (%p1_p2) target bundleno = 10 (0xa), region = 40 }
   0x4   : >> { }
   0x5   : >> { %20 = dma.hbm_to_vmem [thread:$0]  %s1  ;;  %21 = dma.hbm_to_vmem %s2 }
   0x6 LB: >>> { %22 = dma.hbm_to_vmem [thread:$0]  %s3  ;;  %v1_v1 = vld [vmem:[%s4]] }
   0x7   : >>> { %23 = sbr.rel (!%p3_p4) target bundleno = 6 (0x6), region = 41 }
   0x8   : >>> { %24 = vst [vmem:[#allocation7_spill] sm:$0xff] %v1_v1 }
   0x9 PF: >> { %25 = vmatpush1.bf16.msra.mxu0 %v1  ;;  %26 = vmatmul.mubr.bf16.mxu1 %v2 }
   0xa PF: >> { %27 = sbr.rel (%p5_p6) target bundleno = 15 (0xf), region = 42 }
   0xb   : >> { }
   0xc   : >> { %28 = vmatpush1.bf16.msra.mxu0 %v1  ;;  %29 = vmatmul.mubr.bf16.mxu1 %v2 }
   0xd   : >> { %v3_v3 = vld [vmem:[#allocation8_spill] sm:$0xff] }
   0xe   : >> { }
   0xf PF: >> { %30 = sbr.rel (!%p7_p8) target bundleno = 2 (0x2), region = 43 }
  0x10   : >> { }
  0x11 PF: > { %31 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s5, /*hbm=*/%s6 }
  0x12   : > { %32 = sbr.rel (!%p9_p10) target bundleno = 1 (0x1), region = 44 }
  0x13   : > { }
  0x14 PF:  { %33 = vsyncpa [#allocation3], 1 }
"""


def regions(schedule, kind):
    return [(r.first, r.end) for r in schedule.regions if r.kind == kind]


def test_loops_and_guarded_regions_end_after_the_delay_slots():
    from scripts._tpu_schedule import read_schedule

    schedule = read_schedule(LISTING)
    assert len(schedule.bundles) == 21
    assert regions(schedule, "loop") == [(1, 20), (2, 17), (6, 9)]
    assert regions(schedule, "guarded") == [(5, 10), (12, 15)]


def test_operations_are_counted_and_remarks_are_not():
    from scripts._tpu_schedule import operations_of, read_schedule, whole

    schedule = read_schedule(LISTING)
    counted = operations_of(schedule, whole(schedule))
    assert counted._asdict() == dict(
        matrix=4, copies_in=3, copies_out=1, spill_stores=1, spill_loads=1
    )


def test_the_steady_block_is_the_branch_that_computes_and_fetches():
    from scripts._tpu_schedule import read_schedule, steady_of

    steady = steady_of(read_schedule(LISTING), turns=(4,))
    assert (steady.region.first, steady.region.end) == (5, 10)
    # Five bundles, of which the inner loop's three run thrice more.
    assert steady.body == 5 + 3 * 3
    assert steady.operations.copies_in == 2 + 4
    # Of the loop over blocks, what is in neither branch; of that over rows, the rest.
    assert steady.around == 15 - 5 - 3
    assert steady.outer == 19 - 15


def test_without_matrix_operations_the_longest_loop_is_the_steady_block():
    from scripts._tpu_schedule import read_schedule, steady_of

    steady = steady_of(read_schedule(LISTING.replace("vmat", "vadd")), turns=(1, 1))
    assert (steady.region.first, steady.region.end) == (1, 20)
    assert (steady.body, steady.around, steady.outer) == (19, 0, 0)


def test_turns_for_other_loops_than_there_are_are_an_error():
    from scripts._tpu_schedule import read_schedule, steady_of

    with pytest.raises(ValueError, match="has 1 inner loops, .* for 2"):
        steady_of(read_schedule(LISTING), turns=(4, 4))


@pytest.mark.parametrize("listing", ("", "no bundle", LISTING.replace("0xd ", "0xe ")))
def test_what_is_no_schedule_is_an_error(listing):
    from scripts._tpu_schedule import read_schedule

    with pytest.raises(ValueError, match="not numbered from 0 on"):
        read_schedule(listing)
