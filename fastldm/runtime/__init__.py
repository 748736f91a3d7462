"""A loaded model, run: the loop, its batches, and the graphs on a GPU."""
