"""The record of a run and how it is shown: counts per pass, progress, and the closing report."""
