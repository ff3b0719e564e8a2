"""Files that strangers wrote, and saves that cannot be half done: bounded reads, staged writes, the manifest."""
