# can the small shape learn letters? c3 goes on with pure lettering quizzes: loss and accuracy at the letters
import random,torch,time,sys
from transformers import AutoModelForCausalLM
from torch.nn.functional import cross_entropy
from scripts.pocket import world as W
from scripts.pocket.tokenizer import make_tokenizer
from scripts.pocket.pretrain import keep_freed_memory
torch.set_num_threads(1); keep_freed_memory(); t=make_tokenizer(); m=AutoModelForCausalLM.from_pretrained(sys.argv[1],dtype=torch.float32)
L=t.convert_tokens_to_ids([' A',' B',' C',' D']); r=random.Random(1); opt=torch.optim.AdamW(m.parameters(),lr=3e-3,betas=(.9,.98))
def doc():
    o=r.sample(r.choice((W.VALUES,W.EFFECTS)),4); k=[r.randrange(4) for _ in range(6)]
    return W.listed(o)+"\n"+" ".join(f"Answer {o[i]}: {W.LETTERS[i]}." for i in k)+"</s>"
t0=time.time(); buf=[]
for s in range(3000):
    while len(buf)<2048: buf+=t.encode(doc())
    x=torch.tensor(buf[:2048]).view(16,128); buf=buf[2048:]
    for g in opt.param_groups: g['lr']=3e-3*min(1,(s+1)/50)
    lo=m(input_ids=x).logits[:,:-1]; y=x[:,1:]
    loss=cross_entropy(lo.flatten(0,1),y.flatten()); opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(m.parameters(),1.); opt.step()
    if (s+1)%50==0:
        prev=x[:,:-1]; colon=t.convert_tokens_to_ids(':'); k=torch.isin(y,torch.tensor(L))&(prev==colon)
        print(s+1,'loss',round(loss.item(),3),'letter loss',round(cross_entropy(lo[k],y[k]).item(),3),'letters right',round(100*(lo[k].argmax(-1)==y[k]).float().mean().item()),f'{time.time()-t0:.0f}s',flush=True)
