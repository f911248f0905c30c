"""What README.md and nbs/index.ipynb show between markers, made from the notebooks and from data/results/*.csv.

python tests/readme.py                    fill in the blocks
python tests/readme.py --measured demo    first take over results.csv and kept.png of a demo, and run the quickstart
"""
import json, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, INDEX, ROWS, PICTURE = ROOT/'README.md', ROOT/'nbs'/'index.ipynb', ROOT/'data'/'results'/'demo.csv', ROOT/'nbs'/'images'/'kept.png'
sys.path.insert(0, str(ROOT/'tests'))
from notebooks import notebooks, read_cells


def lesson(path):
    "What a lesson says about itself: title, summary, module, time and number of exercises."
    cells = read_cells(path)
    md = [s for kind, s in cells if kind == 'markdown']
    text = '\n\n'.join(md)
    find = lambda pattern, where: (re.search(pattern, where, re.M | re.S) or [None, ''])[1].strip()
    exercises = text[text.find('\n## Exercises'):] if '\n## Exercises' in text else ''
    return dict(name=path.stem, path=path.relative_to(ROOT/'nbs').as_posix(), title=find(r'^# (.+?)$', md[0]), summary=find(r'^> (.+?)$', md[0]),
                module=find(r'^#\| default_exp (\S+)', '\n'.join(s for kind, s in cells if kind == 'code')),
                time=find(r'\*\*Time:\*\*\s*(.+?)\.(?:\s|$)', text), exercises=len(re.findall(r'^\d+\. ', exercises, re.M)),
                solutions=(ROOT/'nbs'/'solutions'/path.name).is_file())


def lessons():
    "The numbered notebooks, in reading order."
    return [lesson(p) for p in notebooks() if p.parent.name != 'solutions' and p.stem[:2].isdigit()]


def lesson_table(nbs):
    "The lessons as a Markdown table; `nbs` is the way from the page to the notebooks, 'nbs/' or ''."
    rows = ['| lesson | what it is about | module | time | exercises |', '|---|---|---|---|---|']
    for l in lessons():
        worked = f' · [worked]({nbs}solutions/{l["name"]}.ipynb)' if l['solutions'] else ''
        module = f'`{l["module"]}`' if l['module'] else ''
        rows.append(f'| [{l["name"].split("_")[0]} {l["title"]}]({nbs}{l["path"]}) | {l["summary"]} | {module} | {l["time"]} | {l["exercises"] or ""}{worked} |')
    return '\n'.join(rows)


def lesson_list(nbs):
    "The lessons by folder, a line each."
    title = lambda folder: folder.partition('_')[2].capitalize()
    folders = {}
    for l in lessons(): folders.setdefault(l['path'].split('/')[0], []).append(f'[{l["name"].split("_")[0]} {l["title"]}]({nbs}{l["path"]})')
    return '\n'.join(f'- **{title(folder)}**: {" · ".join(links)}' for folder, links in folders.items())


def quickstart():
    "The Python lines of the README."
    return re.search(r'<!-- quickstart -->\s*```python\n(.*?)```', README.read_text(encoding='utf-8'), re.S)[1]


def run_quickstart():
    "What they print, each time measured again."
    return subprocess.run([sys.executable, '-c', quickstart()], capture_output=True, text=True, check=True).stdout.strip()


def measured_blocks():
    "The blocks that data/results/demo.csv decides."
    from vitprune_nb.demo import summary, table_text
    from vitprune_nb.evidence.results import read_rows
    rows = read_rows(ROWS)
    r = rows[0]
    machine = (f'Measured on {r["device_name"]}, {r["threads"]} threads, {r["dtype"]}, batch {r["batch"]}, PyTorch {r["torch"]}, Python {r["python"]}, '
               f'on {r["date"][:10]}; commit `{r["commit"]}`; {r["images"]:,} test images of the {r["data"]} set, {r["note"]}.')
    return dict(demo=f'```text\n{table_text(rows)}\n\n{summary(rows)}\n```', machine=machine)


def engine_block():
    "What share of the saved MACs becomes saved time, from data/results/engine.csv."
    from vitprune_nb.evidence.results import markdown_table, read_rows
    rows = read_rows(ROWS.with_name('engine.csv'))
    dense = {r['dtype']: r for r in rows if r['method'] == 'dense'}
    ratio = lambda r, key: r[key]/dense[r['dtype']][key]
    columns = {'mode': 'method', 'dtype': 'dtype', 'MACs saved': lambda r: f"{1 - ratio(r, 'macs'):.1%}",
               'time saved': lambda r: f"{1 - ratio(r, 'latency_ms'):.1%}",
               'time saved / MACs saved': lambda r: f"{(1 - ratio(r, 'latency_ms'))/(1 - ratio(r, 'macs')):.2f}",
               'speed-up': lambda r: f"{1/ratio(r, 'latency_ms'):.2f}"}
    table, first = markdown_table([r for r in rows if r['method'] != 'dense'], columns), rows[0]
    return f'{table}\n\nBatch {first["batch"]}, {first["threads"]} threads, {first["device_name"]}.'


def tournament_block():
    "The budget of which most is recorded in data/results/tournament.csv, each method beside its chance and the dense control."
    from vitprune_nb.evidence.report import chance_table, leader_text, leaders, read_pairs, stage, target
    from vitprune_nb.evidence.results import read_rows
    from vitprune_nb.experiment import read_experiment, stages, units
    plan, rows = read_experiment(ROOT/'configs'/'tournament.toml'), read_rows(ROWS.with_name('tournament.csv'))
    size = {b: sum(target(r) == b for r in rows) for b in plan.reductions}
    budget = max(size, key=size.get)
    shown = [r for r in rows if target(r) in (0, budget)]
    dense, control = ([100*r[k] for k in ('top1', 'top1_low', 'top1_high')] if r else None
                      for r in (next((r for r in rows if r['method'] == 'dense' and stage(r) == s), None) for s in ('before recovery', 'after recovery')))
    said = f'The dense model has {dense[0]:.1f}% ({dense[1]:.1f}–{dense[2]:.1f})'
    if control: said += f', and {control[0]:.1f}% ({control[1]:.1f}–{control[2]:.1f}) after the same pass of training'
    first, made = rows[0], dict.fromkeys(f'`{r["commit"]}`' for r in rows)
    n = sum(len(stages(plan, u)) for u in units(plan))
    text = (f"{len(rows)} of the tournament's {n} rows are recorded. {first['backbone']} at {plan.model_args['img_size']} px from DINOv2 weights tuned further for saliency "
            f"(`data/README.md`), {first['images']:,} test images of {first['data']}, 95% intervals, one seed; {first['device_name']}; commits {', '.join(made)}.")
    pairs = read_pairs(ROWS.with_name('tournament_pairs.csv'))
    best = '\n'.join(f'- {leader_text(found)}' for found in leaders(shown, pairs))
    return f"{said}.\n\n{chance_table(shown, pairs)}\n\nWho is ahead of all others at this budget, with the luck of choosing the leader paid for:\n\n{best}\n\n{text}"


def speed_block():
    "How much of the saved MACs is saved time at batch 16 or 32, from the records of lessons 11c, 12c and 13c."
    from vitprune_nb.evidence.results import markdown_table, read_rows
    lines, where = [], {}
    def line(method, dense, r):
        where[f"{r['device_name']}, {r['threads']} threads, {r['dtype']}"] = True
        saved, time = 1 - r['macs']/dense['macs'], 1 - r['latency_ms']/dense['latency_ms']
        lines.append({'method': method, 'shape': r['backbone'].split('_patch')[0].replace('_', ' ').replace('deit', 'DeiT'), 'batch': r['batch'], 'MACs saved': f'{saved:.1%}', 'time saved': f'{time:.1%}',
                      'time saved / MACs saved': f'{time/saved:.2f}'})
    for name, keep, label in (('patch_times', lambda r: r['method'] == 'keys entering', lambda r: 'patch slimming'),
                              ('channels_speed', lambda r: r['method'] == 'vtp', lambda r: f"VTP, {r['schedule']['channels']}"),
                              ('life_speed', lambda r: r['method'] == 'life' and r['batch'] == 32 and 'whole' in r['note'], lambda r: 'life regression')):
        rows = read_rows(ROWS.with_name(f'{name}.csv'))
        for r in filter(keep, rows): line(label(r), next(d for d in rows if d['method'] == 'dense' and (d['backbone'], d['batch']) == (r['backbone'], r['batch'])), r)
    return markdown_table(lines, {c: c for c in lines[0]}) + f"\n\n{' and '.join(where)}."


def model_block():
    "The course model in a sentence, from data/model/course.json."
    m = json.loads((ROOT/'data/model/course.json').read_text(encoding='utf-8'))
    return (f'The course model is a ViT-S for 32×32 px (12 blocks, 384 wide, patches of 4 px), fine-tuned on CIFAR-10: {100*m["top1"]:.1f}% top-1 '
            f'({100*m["top1_low"]:.1f} to {100*m["top1_high"]:.1f}) on all {m["images"]:,} test images. How it was made is a lesson: [09](nbs/6_reference/09_course.ipynb).')


def blocks():
    "All blocks of the README that can be made again without measuring anything."
    return dict(measured_blocks(), tournament=tournament_block(), speed=speed_block(), engine=engine_block(), model=model_block(), lessons=lesson_list('nbs/'))


def update_index():
    "Fill the lesson table of the map; returns True when it changed."
    nb = json.loads(INDEX.read_text(encoding='utf-8'))
    old = json.dumps(nb)
    for c in nb['cells']:
        s = ''.join(c['source'])
        if '<!-- lessons:start -->' in s:
            start, end = s.index('<!-- lessons:start -->') + len('<!-- lessons:start -->'), s.index('<!-- lessons:end -->')
            c['source'] = (s[:start] + '\n\n' + lesson_table('') + '\n\n' + s[end:]).splitlines(keepends=True)
    if json.dumps(nb) == old: return False
    INDEX.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
    return True


def main(args):
    from vitprune_nb.evidence.results import update_block
    changed = {}
    if args[:1] == ['--measured']:
        demo = Path(args[1])
        for path in (ROWS, PICTURE): path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(demo/'results.csv', ROWS)
        shutil.copyfile(demo/'kept.png', PICTURE)
        changed['quickstart'] = update_block(README, 'quickstart-output', f'```text\n{run_quickstart()}\n```')
    changed |= {name: update_block(README, name, text) for name, text in blocks().items()}
    changed['map'] = update_index()
    print('changed:', ', '.join(k for k, v in changed.items() if v) or 'nothing')


if __name__ == '__main__': main(sys.argv[1:])
