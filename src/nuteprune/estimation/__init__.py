"""What a run will take, before it: measured in a rehearsal on this machine, computed for GPUs by name."""
