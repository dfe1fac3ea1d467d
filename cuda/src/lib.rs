//! The CUDA runtime. Not built yet: see README.md beside the manifest.
