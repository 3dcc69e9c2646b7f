"""Several workers on one job, on one host or on hosts that share a file system.

A run with workers keeps the job as every run does: it alone writes the database.  It leaves in a folder that all workers see what has to be
answered (task.py), and collects what they have answered (collect.py).  A worker leases ranges of lines (leases.py, board.py), has an engine
answer them (supply.py, worker.py), and appends its results to a file that nobody else writes, its shard (shard.py, results.py).

Nothing here relies on locks or on the clocks of two hosts.  Files appear whole, by a link that fails where the name exists or by a rename
(place.py).  Who is alive is judged by each observer with its own clock (members.py).  A wrong judgement costs time, never an answer: lines
that two workers answer have two records, of which the first that is collected counts.
"""
