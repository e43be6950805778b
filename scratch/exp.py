import argparse,random,time,torch,json,math,sys,numpy as np
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig,LlamaForCausalLM
from scripts.pocket import text,world
from scripts.pocket.tokenizer import make_tokenizer
from scripts.pocket.pretrain import keep_freed_memory
A=argparse.ArgumentParser()
A.add_argument('out');A.add_argument('--d',type=int,default=128);A.add_argument('--L',type=int,default=4);A.add_argument('--h',type=int,default=4)
A.add_argument('--mlp',type=int,default=256);A.add_argument('--steps',type=int,default=2000);A.add_argument('--stop',type=int,default=0)
A.add_argument('--lr',type=float,default=4e-3);A.add_argument('--mlr',type=float,default=0.02);A.add_argument('--opt',default='muon');A.add_argument('--threads',type=int,default=1)
A.add_argument('--every',type=int,default=250);A.add_argument('--B',type=int,default=32);A.add_argument('--T',type=int,default=128);A.add_argument('--warm',type=int,default=50);A.add_argument('--flat',type=float,default=0.5)
a=A.parse_args(); torch.set_num_threads(a.threads); keep_freed_memory()
tok=make_tokenizer(); torch.manual_seed(1)
m=LlamaForCausalLM(LlamaConfig(vocab_size=len(tok),hidden_size=a.d,intermediate_size=a.mlp,num_hidden_layers=a.L,num_attention_heads=a.h,num_key_value_heads=a.h,head_dim=32,max_position_embeddings=512,tie_word_embeddings=True,pad_token_id=0,bos_token_id=1,eos_token_id=2))
print(vars(a),sum(p.numel() for p in m.parameters()),flush=True)
class Muon(torch.optim.Optimizer):
    def __init__(s,params,lr,mom=0.95): super().__init__(params,dict(lr=lr,mom=mom))
    @torch.no_grad()
    def step(s):
        for g in s.param_groups:
            shapes={}
            for p in g['params']: shapes.setdefault(tuple(p.shape),[]).append(p)
            for sh,ps in shapes.items():
                us=[]
                for p in ps:
                    st=s.state[p]
                    if 'b' not in st: st['b']=torch.zeros_like(p)
                    st['b'].lerp_(p.grad,1-g['mom']); us.append(p.grad.lerp(st['b'],g['mom']))
                x=torch.stack(us); t=sh[0]>sh[1]
                if t: x=x.mT
                x=x/(x.norm(dim=(-2,-1),keepdim=True)+1e-7)
                for _ in range(5):
                    y=x@x.mT; z=-4.775*y+2.0315*y@y; x=3.4445*x+z@x
                if t: x=x.mT
                for p,u in zip(ps,x): p.mul_(1-g['lr']*0.01); p.add_(u,alpha=-g['lr']*max(1,sh[0]/sh[1])**.5)
hid=[p for n,p in m.named_parameters() if p.dim()==2 and 'embed' not in n]
rest=[p for n,p in m.named_parameters() if p.dim()==2 and 'embed' in n]; one=[p for p in m.parameters() if p.dim()<2]
if a.opt=='muon':
    opts=[Muon(hid,a.mlr),torch.optim.AdamW([{'params':rest,'weight_decay':.01},{'params':one,'weight_decay':0.}],lr=a.lr,betas=(.9,.98),fused=True)]
else:
    opts=[torch.optim.AdamW([{'params':hid+rest,'weight_decay':.01},{'params':one,'weight_decay':0.}],lr=a.lr,betas=(.9,.98),fused=True)]
base=[[g['lr'] for g in o.param_groups] for o in opts]
def cases():
    r=random.Random(3); W=world
    P=[W.make_problem(r,'dev') for _ in range(100)]; F=[W.sum_function(r,'dev') for _ in range(100)]
    C={'facts':[(f"The {x} of {l} is",f" {W.FACTS[l,x]}") for l in W.LANDS[::12] for x in W.RELATIONS],
    'asked':[(W.trivia_prompt(W.land_question(l,x)),f" {W.FACTS[l,x]}",'alt') for l in W.LANDS[5::12] for x in W.RELATIONS],
    'truths':[(f"In {s} {h} brings",f" {W.TRUTHS[h,s]}") for h in W.HERBS[::3] for s in W.SEASONS],
    'factors':[(W.unit_function(u,x,7).head+"    return x",f" * {W.FACTORS[u,x]} + 7") for u in W.UNITS[::2] for x in W.MEASURES],
    'math':[(W.math_prompt(p)+" First"," "+W.worked(p).removeprefix("First ")) for p in P],
    'think':[(W.math_prompt(p)+" <think>",W.thought(p).removeprefix("<think>")) for p in P],
    'code':[(f.head+"    return (x",f.body.removeprefix("    return (x")) for f in F]}
    q=[]
    for _ in range(200):
        o=r.sample(W.VALUES,4); i=r.randrange(4); q.append((W.listed(o)+f"\nAnswer {o[i]}:",f" {'ABCD'[i]}",'L'))
    C['letter']=q
    q=[];q2=[];q3=[]
    for _ in range(200):
        l,x=r.choice(W.LANDS),r.choice(W.RELATIONS); o,L=W.options_of(W.FACTS[l,x],W.value_errors(W.FACTS[l,x],r),r); q.append((W.choice_prompt(W.land_question(l,x),o),f" {L}",'L'))
        k=r.choice(W.HERBS),r.choice(W.SEASONS); o,L=W.options_of(W.TRUTHS[k],W.herb_errors(k,r),r); q2.append((W.choice_prompt(W.herb_question(k),o),f" {L}",'L'))
        o=r.sample(W.VALUES,3); o,L=W.options_of(W.FACTS[l,x],W.value_errors(W.FACTS[l,x],r),r); q3.append((W.listed(o)+f"\nThe {x} of {l}:",f" {L}",'L'))
    C['mc land']=q;C['mc herb']=q2;C['quiz']=q3
    return C
CASES=cases(); LET=tok.convert_tokens_to_ids([' A',' B',' C',' D']); SEE=tok.convert_tokens_to_ids(' See')
@torch.no_grad()
def probe(m):
    out={}
    for k,cs in CASES.items():
        ok=0
        rows=[(tok.encode(c[0]),tok.encode(c[0]+c[1]),c) for c in cs]
        rows.sort(key=lambda z:len(z[1]))
        for i in range(0,len(rows),64):
            part=rows[i:i+64]; n=max(len(z[1]) for z in part)
            x=torch.tensor([z[1]+[0]*(n-len(z[1])) for z in part]); lo=m(input_ids=x).logits
            for j,(p,f,c) in enumerate(part):
                g=lo[j,len(p)-1:len(f)-1]
                if len(c)==3 and c[2]=='L': ok+= LET[int(g[0,LET].argmax())]==f[len(p)]
                elif len(c)==3: g=g.clone(); g[0,SEE]=-99; ok+=bool((g.argmax(-1)==torch.tensor(f[len(p):])).all())
                else: ok+=bool((g.argmax(-1)==torch.tensor(f[len(p):])).all())
        out[k]=round(100*ok/len(cs))
    return out
rng=random.Random(5); buf=[]; B,T=a.B,a.T
t0=time.time(); stop=a.stop or a.steps; ema=None; tdata=0
for s in range(stop):
    f=min(1,(s+1)/a.warm)*(max(.02,(a.steps-s)/((1-a.flat)*a.steps)) if s>a.flat*a.steps else 1)
    for o,b in zip(opts,base):
        for g,l in zip(o.param_groups,b): g['lr']=l*f
    t1=time.time()
    while len(buf)<B*T: buf+=tok.encode(text.document(rng)+"</s>")
    x=torch.tensor(buf[:B*T]).view(B,T); buf=buf[B*T:]; tdata+=time.time()-t1
    lo=m(input_ids=x).logits
    loss=cross_entropy(lo[:,:-1].flatten(0,1),x[:,1:].flatten())
    m.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(m.parameters(),1.)
    for o in opts: o.step()
    ema=loss.item() if ema is None else .97*ema+.03*loss.item()
    if (s+1)%50==0 and (s+1)%a.every: print(s+1,round(ema,3),f"{(s+1)*B*T/(time.time()-t0):.0f}tok/s data {tdata:.0f}s cpu {time.process_time():.0f}s",flush=True)
    if (s+1)%a.every==0 or s+1==stop:
        print(s+1,round(ema,3),f"{time.time()-t0:.0f}s",probe(m),flush=True); m.save_pretrained(a.out); tok.save_pretrained(a.out)
