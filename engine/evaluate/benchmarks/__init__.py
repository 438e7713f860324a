"""Benchmarks that papers report: each one's own files read, its own rules of scoring, its table beside published ones.

| name | file | what is drawn or asked | scored by |
|---|---|---|---|
| geneval | geneval_prompts | 553 prompts about objects | a detector, by the published rules, or its own program |
| dpg | dpg_bench | 1,065 paragraphs | the judge, question by question, or its own program |
| wise | wise | 1,000 prompts that need knowledge | the judge, or its own program |
| t2i_compbench | compbench | 300 prompts in each of eight categories | the judge, or its own program |
| mmmu | mmmu | questions of 30 college subjects | rules |
| mmbench | mmbench | multiple choice, asked with the options in every order | rules |
| pope | pope | is this object in the picture? | rules |
| mathvista | mathvista | mathematics in pictures | rules, and the judge for answers that rules cannot read |
| unifybench | (`engine.data.unifybench`) | concepts | as without --benchmark |

`known.py` lists them, `data_sets.py` says where to get them; `asking.py` and `layouts.py` are what their readers share,
`benchmark_outcome.py` what their scores are.
"""
