"""Where the time goes, and what it is beside others."""
