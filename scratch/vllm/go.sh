cd /tmp/w/p2/vllm; export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTHONPATH=/tmp/w/hpocket /work/main/.venv/bin/python ref.py
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING
/tmp/w/vllmenv/bin/python check.py antiexpert
/tmp/w/vllmenv/bin/python check.py base
