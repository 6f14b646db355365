"""C++ kernels, and settings of oneDNN and OpenMP that must be set before torch is imported."""
