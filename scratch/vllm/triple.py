# the composite prototype (same prompt for all roles) against our engine
import sys,os,json; sys.path.insert(0,'/work/shared/vllm')
os.chdir('/work/shared/vllm')
def main():
    import pt_composite; pt_composite.register()
    from vllm import LLM, SamplingParams
    M='/tmp/w/hpocket/pocket/models/'; ref=json.load(open('/tmp/w/p2/vllm/ref3.json'))
    conf={"proxytune":dict(expert=M+"expert",antiexpert=M+"antiexpert",base_architectures=["LlamaForCausalLM"])}
    llm=LLM(model=M+"base",dtype="float32",enforce_eager=True,max_model_len=256,max_num_seqs=8,block_size=32,additional_config=conf,hf_overrides={"architectures":["ProxyTunedForCausalLM"]})
    got=[list(o.outputs[0].token_ids) for o in llm.generate([{"prompt_token_ids":p} for p in ref['ids']],SamplingParams(temperature=0,max_tokens=40),use_tqdm=False)]
    print('RESULT triple',sum(a==b for a,b in zip(got,ref['tokens'])),'of',len(got),flush=True)
if __name__=='__main__': main()
