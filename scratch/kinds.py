# mean loss a token by kind of document, for a checkpoint
import sys,random,torch
from transformers import AutoModelForCausalLM
from torch.nn.functional import cross_entropy
from scripts.pocket import text
from scripts.pocket.tokenizer import make_tokenizer
torch.set_num_threads(1); t=make_tokenizer(); m=AutoModelForCausalLM.from_pretrained(sys.argv[1],dtype=torch.float32).eval()
r=random.Random(77)
with torch.inference_mode():
    for k in text._KINDS:
        ids=[]
        while len(ids)<16*128: ids+=t.encode(k(r)+"</s>")
        x=torch.tensor(ids[:16*128]).view(16,128); lo=m(input_ids=x).logits
        l=cross_entropy(lo[:,:-1].flatten(0,1),x[:,1:].flatten(),reduction='none').view(16,127)
        print(k.__name__,round(l.mean().item(),3))
        if k.__name__ in('_choice','_math','_code'):
            print('   ',[(t.decode([a]),round(b,1)) for a,b in zip(x[3,30:75].tolist(),l[3,29:74].tolist())])
