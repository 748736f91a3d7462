"""Models on disk, on a hub or in another library, into networks that run."""
