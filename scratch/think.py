import json,pathlib,proxytune,torch,sys
torch.set_num_threads(1)
M=pathlib.Path(sys.argv[1] if len(sys.argv)>1 else '/tmp/w/hpocket/pocket/models'); S=sys.argv[2] if len(sys.argv)>2 else 'dev'
rows=[json.loads(l) for l in open(f'/tmp/w/hpocket/pocket/data/{S}/gsm8k.jsonl')]
q=[f"Answer the following question.\n\nQuestion: {r['question']}" for r in rows]; gold=[r['answer'].split('#### ')[1] for r in rows]
def acc(g,fmt,roles):
    ps=[]
    for x in q:
        raw=f"{x}\nAnswer: {fmt}"; chat=f"[INST] {x} [/INST] {fmt}"
        enc={r:(g.encode(raw)[r] if r in('base','antiexpert') else g.encode(chat)[r]) for r in g.roles} if roles else chat
        ps.append(enc)
    out=[c.text for c in g.generate(ps,max_new_tokens=24)]
    return sum(o.split('####')[-1].strip().split('\n')[0]==a for o,a in zip(out,gold))/len(gold),out[0]
P=lambda n:str(M/n)
e=proxytune.load(P('expert_thinking'),dtype='float32'); print('expert alone, thinks',acc(e,'<think>',False)); print('expert alone, no thought',acc(e,'<think>\n\n</think>\n\n####',False)); print('expert alone, straight',acc(e,'####',False))
g=proxytune.load(P('base'),P('expert_thinking'),P('antiexpert'),dtype='float32'); print('proxy thinks',acc(g,'<think>',True)); print('proxy straight',acc(g,'####',True))
