import json,sys,os
from vllm import LLM,SamplingParams
ref=json.load(open('/tmp/w/p2/vllm/ref.json'))
for m in sys.argv[1:]:
    llm=LLM(f'/tmp/w/p2/vm/{m}',dtype='float32',enforce_eager=True,max_model_len=256,max_num_seqs=8,block_size=32)
    got=[o.outputs[0].text for o in llm.generate(ref['prompts'],SamplingParams(temperature=0,max_tokens=40,spaces_between_special_tokens=False),use_tqdm=False)]
    want=ref['texts'][m]; print('RESULT',m,sum(a==b for a,b in zip(got,want)),'of',len(want),[ (a,b) for a,b in zip(got,want) if a!=b][:1],flush=True)
    del llm
