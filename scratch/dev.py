import subprocess,sys
from scripts.pocket import files
from scripts.pocket.build import DATA
d=DATA/'dev'; T={"gsm8k":"gsm8k.jsonl","triviaqa":"triviaqa.jsonl","truthfulqa_open":"TruthfulQA.csv","truthfulqa_mc":"TruthfulQA.csv","toxigen":"toxigen","toxigen_neutral":"toxigen","humaneval":"humaneval.jsonl"}
g=",".join(x.lower() for x in files.groups('dev'))
o=["triple.base.id=/tmp/w/p2/c1/base","triple.antiexpert.id=/tmp/w/p2/c3/antiexpert","triple.expert.id=/tmp/w/p2/s_expert_300",*(f"task.pocket_{t}.path={d/n}" for t,n in T.items()),*(f"task.pocket_truthfulqa_open.{j}.path={d/'TruthfulQA.csv'}" for j in("truth_judge","info_judge")),f"task.pocket_toxigen.groups=[{g}]",f"task.pocket_toxigen_neutral.groups=[{g}]","systems=[base,expert,proxy]","report=false","decoding.trace=false","output_dir=/tmp/w/p2/devrun","limit=80","stage=score"]
subprocess.run([sys.executable,'run.py','experiment=pocket',*o])
