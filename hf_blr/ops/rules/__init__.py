"""Which kernel runs and with which settings: pure functions of sizes, dtype and device properties, without Triton.

The launchers and the roofline ask the same functions. There is no tuning at run time: each function returns the one
setting that won on an H100, cut down until it fits the shared memory of smaller cards. The documentation's findings
have what was tried.
"""
