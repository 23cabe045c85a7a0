"""How the benchmarks measure the most memory that a program held, in one started for it."""

# Code that such a program begins with. The peak is that of this program alone, in MiB:
# ru_maxrss would begin at that of the program which started it.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) for l in status if l.startswith("VmHWM")) / 1024
"""

# Its environment. Blocks of 64 KiB or more go back to the system when they are freed, so that
# what is measured is what was held at once, and not holes that the allocator kept between blocks.
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
