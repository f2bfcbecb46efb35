"""HIP kernels that encode, decode and run HFQ files, and the host that compiles and launches them.

The same sources run on AMD and NVIDIA GPUs and on the CPU. A kernel's signature is read from its source, and every
launch is checked against it. Other rooms use `runtime.host.open_backend`, `encode.device_encoder` and `forward.ops`.
"""
