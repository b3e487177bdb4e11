"""What must also be so on a GPU. `cases.py` has the cases, `driver.py` the process that runs them,
`conftest.py` starts it once. Where there is no GPU the same cases run on the CPU, in the long half
of the tests, so that a mistake in them is found without one."""
