"""Triton kernels: one file per operator, imported at its first call and not before.

A file has the kernels and, under the names of the operator's schemas, what launches them. `fastlm._lib` registers
those as the overload `triton` of each schema.
"""
