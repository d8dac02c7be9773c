"""
Measure this library side by side with its peers, and with LMDB without any library.

``python -m benchmarks --quick`` takes two minutes and shows that everything works; ``python -m
benchmarks`` takes about 25 and is what the documentation shows; ``--long`` takes more than an hour.
All need the extra ``bench``. Nothing but the local disk is used, and everything that was written
there is removed.

What is compared was measured in the same run, in turn (A B C A B C ...), with the same bytes and
the same durability, and every message that was sent was received and compared. The medians of
rounds are shown, and what matters: their ratios.
"""
