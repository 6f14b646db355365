"""C++ kernels, and settings of oneDNN and OpenMP, which must be made before torch is imported."""
