"""Runs untrusted programs in isolation, with a verdict that they cannot fake: docs/sandbox.md.

sandbox.py          our side: starts fork servers, uses all cores, sets fair time limits
sandbox_server.py   the fork server that isolates programs
requirements.py     what a test needs to be judged apart from the program
sandbox_judge.py    the judge's process: it runs the test, and never the program's text
sandbox_program.py  the program's process, which does what the judge asks for
sandbox_together.py program and test in one process, where the test needs it
sandbox_link.py     calls between the two, as plain data (sandbox_codec.py)
sandbox_data.py     arrays, tables and tensors as plain data: sandbox_arrays.py (numpy, scipy),
                    sandbox_tables.py (pandas), sandbox_tensors.py (torch, TensorFlow)
sandbox_errors.py   exceptions as plain data
sandbox_plain.py    the plain values of a program's objects of other classes
sandbox_random.py   the states of random number generators, for tests that seed them
sandbox_child.py    what each of these processes does first
sandbox_root.py     what programs see of the machine: namespaces, a root directory of their own
sandbox_limits.py   what they may ask of the kernel: system call filter, limits
sandbox_hook.py     the isolation by Python's audit events
"""

from tasks.sandbox.sandbox import Program, Sandbox, Verdict, run_programs

__all__ = ["Program", "Sandbox", "Verdict", "run_programs"]
