"""HTTP: one file a dialect, all onto `fastldm.Request` and `fastldm.Session`. Needs the extra `fastldm[serve]`."""
