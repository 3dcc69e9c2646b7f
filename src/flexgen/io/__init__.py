"""Bytes to and from disks: direct reads and writes, checksums, the folder of what is spilled."""
