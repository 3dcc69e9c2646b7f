"""The first quarter of an hour on a GPU, as named steps that one command runs in order, within a budget of time.

    python -m benchmarks.gpu --out DIR [--budget 15min] [--device cuda] [--peers DIR] [--options --host-mem 100GiB]
    python -m benchmarks.gpu --out DIR --list                    # the steps, their commands, what is left out and why
    python -m benchmarks.gpu --out DIR --tiny --device cpu       # tries the command out, in a minute

Each step is a process of its own and leaves a JSON file in DIR, its errors included; what is there and went well is not repeated.  Large
models have random weights, of which nothing is written that lives in memory, and are measured in the middle of a job
(`flexgen bench steady`).
"""
