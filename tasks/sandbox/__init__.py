"""Runs untrusted programs in isolation, with a verdict that they cannot fake.

sandbox.py          our side: starts fork servers, uses all cores, sets fair time limits
sandbox_server.py   the fork server that isolates programs
sandbox_program.py  the process that runs one program and its test
sandbox_jail.py     the isolation by the kernel
"""

from tasks.sandbox.sandbox import Program, Sandbox, Verdict, run_programs

__all__ = ["Program", "Sandbox", "Verdict", "run_programs"]
