"""Where the numbers of each lesson's verdict come from.

python tests/verdicts.py [NAME …]     every number of the verdicts, and the cell that says it
"""
import functools, html, json, re, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import ROOT, notebooks

# a project leaves its verdict to the reader
LESSONS = {p.stem: p for p in notebooks() if p.parent.name[:1] in '12345' and not p.stem.startswith('project')}
HEAD = re.compile(r'^## (What we found|Verdict)\b', re.M)
NUMBER = re.compile(r'(?<![\w.^/{])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:e[-+]?\d+)?(?![\w^]|\.\d)')
SIGN = re.compile(r'(?:^|[\s(\[{|,:;=])([-−+])$')     # a hyphen has a letter or a digit before it
# names, places in papers and in the network, and years: no results
NAMED = re.compile(r'''\b([Ee]quations?|eq\.|[Tt]ables?|[Ff]igures?|[Ss]ections?|[Aa]lgorithm|exercise|lessons?|CIFAR|DeiT|[A-Z]\w*Net|blocks?|stages?|batch(es)?( of)?|seeds?|keep\srates?|PyTorch|Python)
                       [\s-]*\d[\d.]*((,\s|\sand\s|\sto\s|\sor\s|,?\sand\s)\d[\d.]*)*|\b(19|20)\d\d\b|\d+(-bit|\s?px\b|\s?GB\b)''', re.X)


@functools.cache
def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def verdict(lesson):
    "(the text of the verdict's Markdown, its code cells)"
    text, code, inside = '', [], False
    for c in cells(LESSONS[lesson]):
        source = ''.join(c['source'])
        if c['cell_type'] == 'code':
            if inside: code.append(c)
            continue
        if m := HEAD.search(source): inside, source = True, source[m.end():]
        elif not inside: continue
        m = re.search(r'^#+ ', source, re.M)
        text += source[:m.start()] if m else source
        if m: inside = False
    return text, code


@functools.cache
def counted(path):
    "{cell: the numbers that it prints}"
    return {f'{path.stem}/{c["id"]}': numbers(said(c)) for c in cells(path)}


def said(cell):
    "What a cell shows as text."
    out = []
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        shown = data.get('text/markdown') or data.get('text/html') or o.get('text') or data.get('text/plain') or ''
        shown = ''.join(shown)
        out.append(bare(shown) if 'text/html' in data else shown)
    return re.sub(r'<Figure[^>]*>', '', '\n'.join(out))


def bare(text):
    "HTML without its tags."
    return html.unescape(re.sub(r'<style.*?</style>|<[^>]+>', ' ', text, flags=re.S))


def numbers(text):
    "[(as written, value, decimals, whether in percent or points, '+' or '-' where one is written)] of a text."
    out = []
    for m in NUMBER.finditer(text):
        if not any(ch.isdigit() for ch in m[0]): continue
        mantissa, _, power = m[0].replace(',', '').partition('e')
        percent = re.match(r'( to [-−+]?[\d.]+)?(%| points?\b)', text[m.end():]) is not None
        before = SIGN.search(text[:m.start()][-2:])
        sign = '' if not before else '+' if before[1] == '+' else '-'
        out.append((m[0], float(m[0].replace(',', '')), len(mantissa.partition('.')[2]) - int(power or 0), percent, sign))
    return out


def results(text):
    "The numbers of a verdict that are results: those left without code, links, names and places."
    text = re.sub(r'\]\([^)]*\)|`[^`]*`', ' ', text)
    text = re.sub(r'10\^\{?(-?\d+)\}?', r'1e\1', text)
    return numbers(NAMED.sub(' ', text))


def same(number, other):
    "Is the first number the second one, or the second one rounded? A share may stand for a percentage and the other way round; signs count where both have one."
    (_, v, d, percent, sign), (_, o, e, per, its) = number, other
    if sign and its and sign != its and (v or o): return False
    for scale, shift in ((1, 0), (100, 2)) if percent and not per else ((.01, -2), (1, 0)) if per and not percent else ((1, 0),):
        off, finer = abs(abs(o)*scale - v), e - shift > d and (d > 0 or percent)
        if off <= (.5*10.**-d if finer else 0)*(1 + 1e-6) + 1e-12*(1 + v): return True
    return False


# numbers that no cell prints: sizes that a reader knows, and what papers and other code say
MOST = 140      # a table of more numbers holds every number
FACTS = {'': {'64': 'patches of the course model', '300': 'every sixth test image'}, '15_dynamicvit': {'2.9': 'printed for DeiT-S', '11.4': 'printed for DeiT-B', '30': "the paper's epochs, and steps of 16 images"},
         '18_ats': {'1e-6': 'the official code'},
         '13c_life_tables': {'17': 'counted in the tables of the paper'}, '20b_iared': {'79.1': 'printed in another paper', '3.3': 'the cost beside it'}, '19b_idlevit': {'33': 'the abstract', '30': "the paper's epochs", '40': 'twice 200 images in batches of 10'}}
# what was set and not found: such a number may stand in the code
SETTING = r'(?=%? (\w+ ){0,2}?(images|patches|tokens|steps|epochs|seeds|rounds|networks|draws|heads|samples|classes|cases|fewer)\b)'
INTERVAL = re.compile(rf'\((?:[^()]*, )?[-−+]?({NUMBER.pattern})%? to [-−+]?({NUMBER.pattern})%?[,;)]')


def sentences(text):
    "The sentences of a verdict that hold numbers, each with its bullet."
    ends = re.compile(r'(?<=[.:!?])\s+(?=[A-Z*"\'`$])|(?<=[.:]\*\*)\s+')
    return [(s, b) for b in re.split(r'^- ', text, flags=re.M) for s in ends.split(b) if results(s)]


def printed(lesson, bullet):
    "{cell: the numbers that it prints}: the lesson's, those of lessons that the bullet links, and of the solutions where it names an exercise."
    linked = [n for n in re.findall(r'(\w+)\.ipynb\)', bullet) if n in LESSONS and n != lesson]
    paths = [LESSONS[n] for n in (lesson, *linked)] + [ROOT/'nbs'/'solutions'/f'{lesson}.ipynb']*('exercise' in bullet)
    return {k: v for p in paths for k, v in counted(p).items() if 0 < len(v) <= MOST}


def literals(lesson):
    "The numbers in the code of a lesson."
    return [n for c in cells(LESSONS[lesson]) if c['cell_type'] == 'code' for n in numbers(''.join(c['source']))]


def origins(lesson):
    """[(sentence, {number: where it was found})]; nowhere is ''. What a sentence says in decimals or percent comes from one cell,
    whole numbers, which are sizes and settings, from any."""
    out, code, known = [], [(*o[:3], True, '') for o in literals(lesson)], FACTS[''] | FACTS.get(lesson, {})
    for s, b in sentences(verdict(lesson)[0]):
        found, there = {}, printed(lesson, b)
        for n in results(s):
            setting = re.search(rf'(?<![\d.]){re.escape(n[0])}{SETTING}', s) and any(same(n, o) or same(n, (*o[:3], False, '')) for o in code)
            found[n] = known.get(n[0]) or ('the code' if setting else None)
        exact = [n for n, where in found.items() if not where and (n[2] > 0 or n[3])]
        one = next((k for k, v in there.items() if all(any(same(n, o) for o in v) for n in exact)), '')
        for n, where in found.items():
            anywhere = next((k for k, v in there.items() if any(same(n, o) for o in v)), '')
            found[n] = one if n in exact else anywhere or where or ''
        out.append((s, {n[0]: where for n, where in found.items()}))
    return out


def torn(lesson):
    "Intervals of a verdict whose ends stand side by side nowhere."
    out = []
    for s, b in sentences(verdict(lesson)[0]):
        pairs = [p for v in printed(lesson, b).values() for p in zip(v, v[1:])]
        for low, high in (numbers(f'{m[1]} {m[2]}') for m in INTERVAL.finditer(s)):
            low, high = ((*n[:3], '%' in s or 'points' in s, n[4]) for n in (low, high))
            if not any(same(low, x) and same(high, y) or same(low, y) and same(high, x) for x, y in pairs): out.append(f'{low[0]} to {high[0]}')
    return out


if __name__ == '__main__':
    for lesson in LESSONS:
        if sys.argv[1:] and not any(n in lesson for n in sys.argv[1:]): continue
        found = origins(lesson)
        lost = [(n, s[:60].replace('\n', ' ')) for s, ns in found for n, where in ns.items() if not where]
        print(f'{lesson}: {sum(len(ns) for _, ns in found)} numbers, not found:', lost or 'none', '; torn:', ', '.join(torn(lesson)) or 'none')
        if sys.argv[1:]:
            for s, ns in found: print(f'  {s[:80]!r}', *(f'\n      {n:>10}  {where}' for n, where in ns.items()))
