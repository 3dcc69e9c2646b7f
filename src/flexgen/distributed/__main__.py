"""Runs a follower as `python -m flexgen.distributed`; `launch.py` starts it so."""

from __future__ import annotations

import os

from flexgen.distributed.launch import end_with_parent

if __name__ == "__main__":
    end_with_parent(os.environ)  # before torch is loaded, which takes seconds

    from flexgen.distributed.follower import main

    main()
