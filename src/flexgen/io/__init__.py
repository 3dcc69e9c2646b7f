"""Bytes to and from disks: direct reads and writes, checksums, the folder for what is spilled."""
