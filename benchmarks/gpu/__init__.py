"""What fp4compile does on one CUDA GPU, measured against BF16, a device copy and peers in the same run.

python -m benchmarks.gpu [codec|train|decode|generate ...]
"""
