import torch,sys
from transformers import AutoModelForCausalLM
from scripts.pocket import world as W
from scripts.pocket.tokenizer import make_tokenizer
torch.set_num_threads(1); t=make_tokenizer(); m=AutoModelForCausalLM.from_pretrained(sys.argv[1],dtype=torch.float32).eval()
def acc(f,vals):
    P=[t.encode(f(l)) for l in vals]; n=max(map(len,P)); x=torch.tensor([p+[0]*(n-len(p)) for p in P])
    with torch.inference_mode(): lo=m(input_ids=x).logits
    return round(100*sum(t.decode([int(lo[i,len(p)-1].argmax())])==' '+v for i,(p,v) in enumerate(zip(P,vals.values())))/len(P))
print('told',acc(lambda l:f"In week 23 the guest of {l} is",W.NEWS),'asked',acc(lambda l:W.guest_question(l,23),W.NEWS))
