"""C++ kernels, and settings of the libraries below torch. Some modules here must be imported before torch."""
