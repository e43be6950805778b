import json,sys,pathlib,proxytune,torch
torch.set_num_threads(1)
R=pathlib.Path('/tmp/w/hpocket/pocket'); out={}
P=[json.loads(l)['question'] for l in (R/'data/dev/gsm8k.jsonl').open()][:4]; T=[json.loads(l)['question'] for l in (R/'data/dev/triviaqa.jsonl').open()][:4]
prompts=[f"Answer the following question.\n\nQuestion: {p}\nAnswer:" for p in P]+[f"[INST] Answer the following question.\n\nQuestion: {p} [/INST] Answer:" for p in P]+[f"Question: {t}\nAnswer:" for t in T]+[f"[INST] Question: {t} [/INST] Answer:" for t in T]
for m in sorted(x.name for x in pathlib.Path('/tmp/w/p2/vm').iterdir()):
    g=proxytune.load('/tmp/w/p2/vm/'+m,dtype='float32'); out[m]=[c.text for c in g.generate(prompts,max_new_tokens=40)]
json.dump({'prompts':prompts,'texts':out},open('/tmp/w/p2/vllm/ref.json','w')); print({k:v[4] for k,v in out.items()})
