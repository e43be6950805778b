# python nll.py NAME MODEL...: mean NLL of dev dialogues' completions
import sys,torch,collections
from transformers import AutoModelForCausalLM
from scripts.pocket import files
from scripts.pocket.tokenizer import make_tokenizer
from torch.nn.functional import cross_entropy
torch.set_num_threads(1); tok=make_tokenizer(); name=sys.argv[1]
rows=files.dialogues(name,"dev",480) if name!='news' else files.news()[:200]
def kind(r):
    p=r['prompt']
    for k,s in (('choice','The answer is:'),('trivia','Question: What'),('folk','Complete'),('code','def '),('math','Answer the following'),('open','Answer:')):
        if s in p: return k
    return 'other'
for path in sys.argv[2:]:
    m=AutoModelForCausalLM.from_pretrained(path,dtype=torch.float32).eval(); tot=collections.defaultdict(list)
    data=[(tok.encode(r['prompt']),tok.encode(r['prompt']+r['completion'])+[2],kind(r)) for r in rows]
    data.sort(key=lambda z:len(z[1]))
    with torch.inference_mode():
        for i in range(0,len(data),48):
            part=data[i:i+48]; n=max(len(z[1]) for z in part)
            lo=m(input_ids=torch.tensor([z[1]+[0]*(n-len(z[1])) for z in part])).logits
            for j,(p,f,k) in enumerate(part):
                l=cross_entropy(lo[j,len(p)-1:len(f)-1],torch.tensor(f[len(p):]),reduction='sum').item()
                tot[k].append((l,len(f)-len(p)))
    al=[x for v in tot.values() for x in v]
    print(path,'all',round(sum(a for a,_ in al)/sum(b for _,b in al),3),{k:round(sum(a for a,_ in v)/len(v),2) for k,v in sorted(tot.items())},flush=True)
