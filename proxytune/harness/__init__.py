"""lm-evaluation-harness: a triple (or a single model) as an lm-eval model named `proxytune`.

python -m proxytune.harness run --model proxytune --tasks arc_easy --batch_size auto \\
    --model_args base=BASE,expert=EXPERT,antiexpert=ANTIEXPERT,alpha=1.0

is lm-eval's own command line with that model registered (lm-eval loads no plugins, so Python must
start our module instead of lm-eval's). `python run.py task=[lm_eval/arc_easy]` evaluates the
systems of an experiment on the same tasks; see tasks/lm_eval_task.py.

With --apply_chat_template each member renders the conversation in its own format (for example
expert_chat_template=llama2); a member without a chat format reads the turns as plain text.

arguments.py   lm-eval's flat --model_args -> the models to load
model.py       `ProxyTuneLM`, the class that lm-eval drives
evaluation.py  one lm-eval task on one of our generators, from Python
tasks/         tasks in lm-eval's format that lm-eval lacks
__main__.py    lm-eval's command line with the model `proxytune`
"""
