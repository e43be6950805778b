"""Tasks in lm-eval's format that lm-eval lacks; `task=lm_eval/NAME` finds them.

math500_verify.yaml  MATH-500, graded by math-verify (the extra `math`)
grading.py           its grading
"""
