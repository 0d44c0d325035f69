"""The operator in Triton kernels, one subject a file. Importing this package imports no Triton.

`plan` chooses the path; `forward` and `backward` run it; every kernel lies beside its launcher.
"""
