set -e
cd /tmp/w/p2/old538; rm -rf pocket results/runs/pocket; cp -r /tmp/w/hpocket/pocket pocket
export PYTHONPATH=/tmp/w/p2/old538 OMP_NUM_THREADS=1
/work/main/.venv/bin/python run.py limit=2 'task=[pocket_gsm8k,pocket_truthfulqa_mc]' 'systems=[expert,proxy]' report=false output_dir=/tmp/w/p2/golden > /tmp/w/p2/golden.log 2>&1
