"""The process and its machine: devices, memory, signals, other processes."""
