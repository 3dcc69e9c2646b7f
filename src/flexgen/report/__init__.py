"""What a run did and how it is shown: counts per pass, progress, the closing report."""
