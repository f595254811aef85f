"""The CUDA engine. :mod:`cuconv.cuda.runtime` is the only module that imports CuPy."""
