"""Untrusted programs: run shut in, with a verdict that they cannot fake.

sandbox.py          the harness's side: all cores, fair time limits
sandbox_server.py   the fork server that shuts programs in
sandbox_program.py  the process that runs one program and its test
sandbox_jail.py     what the kernel is asked for
"""

from tasks.sandbox.sandbox import Program, Sandbox, Verdict, run_programs

__all__ = ["Program", "Sandbox", "Verdict", "run_programs"]
