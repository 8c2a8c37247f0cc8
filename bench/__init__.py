"""Benchmarks, a package each: speed, gpu, credit, fp8. What several of them share lies beside them."""
