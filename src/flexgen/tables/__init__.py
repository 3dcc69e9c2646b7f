"""Tables: a prompt for each row, and the answers as columns.

A row takes these forms on its way:

1. The row of a file (csv_table.py, jsonl_table.py, parquet_table.py; formats.py chooses) or of a data frame (frames.py).
2. Its prompt (prompts.py with the templates of template.py), with what the answer must be (task.py), as the line of a job.
3. The record of the line, which answers.py reads as the values of the new columns.
4. The row again, with these columns: join.py writes a file, in_memory.py makes a data frame.

Files are read a few rows at a time and more than once, so that memory use does not grow with them.
"""
