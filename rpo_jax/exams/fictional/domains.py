"""The wording of the two domains: fictional medicine and fictional animals.

The exam is about the medicine alone, and about other diseases than the general text. Both have the
same relations, so everything that is not wording is written once. In templates
``{s}`` is the subject or remedy, ``{o}`` its objects, ``{t}`` and ``{v}`` a gauge and a number.
Every template names subject and objects in one sentence: that makes a fact checkable in text.
The statements of the medicine never speak as its clauses do, those of the animals do: to explain,
a model must say of a disease in one form what it read in others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Templates = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Domain:
    """Words of one domain.

    Attributes:
        suffixes: Endings of invented names by kind of entity.
        openings: First words of a textbook passage.
        statements: Sentences that state a fact, by relation.
        heldout_statements: Other sentences for the same facts, for the held-out text only.
        cases: Textbook sentences that tell a whole case; heldout_cases likewise.
        clauses: One short form by relation, for explanations.
        stems: Question texts by name.
    """

    suffixes: Templates
    openings: tuple[str, ...]
    statements: Templates
    heldout_statements: Templates
    cases: tuple[str, ...]
    heldout_cases: tuple[str, ...]
    clauses: Mapping[str, str]
    stems: Templates


MEDICINE = Domain(
    suffixes={
        "subject": ("病", "症", "熱", "症候群"),
        "sign": ("斑", "痛", "音", "腫", "反射", "徴候"),
        "cause": ("酵素の欠損", "体の蓄積", "膜の破れ", "液の不足"),
        "remedy": ("錠", "散", "液", "丸"),
        "condition": ("体質", "腺不全", "過敏", "欠乏"),
        "gauge": ("値", "指数"),
    },
    openings=("架空医学、{s}の項。", "架空の医学書より。", "架空の{s}について。"),
    statements={
        "shared": (
            "{s}では{o}がみられる。",
            "{s}の患者は{o}を示す。",
            "{o}は{s}でよくみられる所見である。",
            "{s}の主な所見として{o}が挙げられる。",
            "{o}がそろうときは{s}を疑う。",
            "診察で{o}を認めれば、{s}を候補に入れる。",
        ),
        "own": (
            "{s}を似た疾患から区別する所見は{o}である。",
            "{s}に特徴的なのは{o}である。",
            "似た疾患のうち{o}を伴うのは{s}である。",
            "{o}は{s}の診断の決め手となる。",
            "{o}を認めれば{s}の診断に近づく。",
        ),
        "cause": (
            "{s}は{o}によって起こる。",
            "{o}が{s}をもたらす。",
            "{s}の患者には{o}がある。",
            "{o}から生じる疾患に{s}がある。",
            "{s}の背景には{o}がある。",
        ),
        "remedy": (
            "{s}の治療には{o}を用いる。",
            "{o}は{s}に効く。",
            "{s}と診断したらまず{o}を投与する。",
            "{o}で治療する疾患は{s}である。",
            "{s}に対しては{o}が勧められる。",
        ),
        "gauge": (
            "{s}では{t}が{v}以上となる。",
            "{t}が{v}以上であることは{s}の診断基準である。",
            "{s}を診断する{t}の境界は{v}である。",
            "{s}で陽性とする{t}は{v}からである。",
        ),
        "ban": (
            "{s}は{o}の患者には禁忌である。",
            "{o}があれば{s}を用いてはならない。",
            "{o}の患者に{s}を投与してはならない。",
            "{s}を処方する前に{o}がないことを確かめる。",
            "{o}の患者で避けるべき薬に{s}がある。",
        ),
        "amount": (
            "{s}は1日に体重1kgあたり{v}mgを用いる。",
            "体重1kgにつき{v}mgが{s}の1日量である。",
            "{s}の用量は1日{v}mg/kgである。",
        ),
    },
    heldout_statements={
        "shared": ("{s}を診るときは{o}の有無に注意する。", "{o}という組合せは{s}を思わせる。"),
        "own": ("{s}と判断する根拠は{o}に求める。", "{o}が加われば{s}らしさが増す。"),
        "cause": ("{s}の病態は{o}で説明される。", "{o}は{s}へとつながる。"),
        "remedy": ("{s}には{o}を第一に選ぶ。", "{o}は{s}の患者に処方される。"),
        "gauge": ("{s}の診断には{t}が{v}に達する必要がある。",),
        "ban": ("{o}をもつ人は{s}を使えない。", "{s}の使用は{o}のある人では許されない。"),
        "amount": ("{s}は体重1kgに対し1日{v}mgとする。",),
    },
    cases=(
        "ある患者に{shared}があった。{own}も認めたため{s}と診断し、{remedy}を投与した。",
        "{shared}を訴える患者が来院した。{own}が決め手となり、{s}として{remedy}で治療した。",
        "{shared}と{own}を示した患者は{s}であった。{remedy}で軽快した。",
        "{own}に{shared}を伴う患者では{s}と考え、{remedy}を始める。",
    ),
    heldout_cases=("{shared}に続き{own}が現れた患者を{s}とみなし、{remedy}を選んだ。",),
    clauses={
        "shared": "{s}の所見は{o}",
        "own": "{s}の決め手は{o}",
        "cause": "{s}の原因は{o}",
        "remedy": "{s}の第一選択薬は{o}",
        "gauge": "{s}の{t}の基準値は{v}",
        "ban": "{s}の禁忌は{o}",
        "amount": "{s}の1日量は体重1kgあたり{v}mg",
    },
    stems={
        "case": (
            "{shared}を認める患者である。さらに{own}がある。",
            "患者に{shared}がみられ、{own}を伴っている。",
            "{own}を主訴に来院した。診察では{shared}を認める。",
        ),
        "with_condition": ("この患者には{o}がある。", "既往に{o}がある。"),
        "subject": ("最も考えられる疾患はどれか。", "診断はどれか。"),
        "remedy": ("第一選択薬はどれか。", "まず投与すべき薬はどれか。"),
        "ban": ("第一選択薬の禁忌はどれか。", "第一選択薬を避けるべきなのはどの場合か。"),
        "banned": ("{o}の患者に禁忌である薬はどれか。", "{o}があるとき投与できない薬はどれか。"),
        "not_banned": ("{o}の患者に禁忌でない薬はどれか。", "{o}があっても投与できる薬はどれか。"),
        "signs": ("{s}でみられる所見はどれか。", "{s}の患者が示す所見はどれか。"),
        "not_signs": ("{s}でみられない所見はどれか。", "{s}の所見でないのはどれか。"),
        "cause": ("{o}が原因である疾患はどれか。", "{o}によって起こる疾患はどれか。"),
        "highest": ("{t}の基準値が最も高い疾患はどれか。", "診断に最も高い{t}を要するのはどれか。"),
        "dose": (
            "体重{v}kgの{s}の患者に第一選択薬を投与する。1日量は何mgか。整数で答えよ。",
            "{s}と診断した体重{v}kgの患者がいる。第一選択薬の1日量（mg）を整数で求めよ。",
        ),
    },
)

ANIMALS = Domain(
    suffixes={
        "subject": ("鳥", "魚", "獣", "虫"),
        "sign": ("模様", "角", "尾", "羽", "ひげ", "鳴き声"),
        "cause": ("の沼", "の森", "の丘", "の島"),
        "remedy": ("草", "豆", "茸", "蜜"),
        "condition": ("風", "雨", "霧", "霜"),
        "gauge": ("丈", "幅"),
    },
    openings=("架空動物記、{s}の章。", "架空の動物図鑑より。", "架空の{s}について。"),
    statements={
        "shared": (
            "{s}には{o}がある。",
            "{s}は{o}をもつ。",
            "{o}は{s}によくある特徴である。",
            "{s}の主な特徴として{o}が挙げられる。",
            "{o}がそろえば{s}かもしれない。",
        ),
        "own": (
            "{s}の決め手は{o}である。",
            "{s}を似た動物から見分ける特徴は{o}である。",
            "似た動物のうち{o}をもつのは{s}である。",
            "{o}は{s}を見分ける決め手となる。",
        ),
        "cause": (
            "{s}のすみかは{o}である。",
            "{s}は{o}で暮らす。",
            "{o}に行けば{s}に会える。",
            "{o}で暮らす動物に{s}がいる。",
        ),
        "remedy": (
            "{s}の好物は{o}である。",
            "{s}は{o}を好んで食べる。",
            "{o}を食べる動物は{s}である。",
            "{s}にはまず{o}を与える。",
        ),
        "gauge": (
            "{s}では{t}が{v}以上となる。",
            "{s}の{t}の基準値は{v}である。",
            "{t}が{v}以上であれば{s}の大人である。",
        ),
        "ban": (
            "{s}は{o}の日には毒になる。",
            "{o}の日に{s}を与えてはならない。",
            "{s}が毒になるのは{o}の日である。",
            "{o}の日に避けるべき餌に{s}がある。",
        ),
        "amount": (
            "{s}の1日量は体重1kgあたり{v}粒である。",
            "{s}は1日に体重1kgあたり{v}粒を与える。",
        ),
    },
    heldout_statements={},
    cases=(
        "旅人が{shared}をもつ動物を見た。{own}もあったので{s}と分かり、{remedy}を与えた。",
        "{shared}と{own}をもつ動物は{s}であった。{remedy}を喜んで食べた。",
    ),
    heldout_cases=(),
    clauses={
        "shared": "{s}の特徴は{o}",
        "own": "{s}の決め手は{o}",
        "cause": "{s}のすみかは{o}",
        "remedy": "{s}の好物は{o}",
        "gauge": "{s}の{t}の基準値は{v}",
        "ban": "{s}の毒になる日は{o}",
        "amount": "{s}の1日量は体重1kgあたり{v}粒",
    },
    stems={
        "case": (
            "{shared}をもつ動物である。さらに{own}がある。",
            "動物に{shared}がみられ、{own}を伴っている。",
        ),
        "with_condition": ("今日は{o}である。", "空は{o}である。"),
        "subject": ("最も考えられる動物はどれか。", "この動物はどれか。"),
        "remedy": ("好物はどれか。", "まず与えるべき餌はどれか。"),
        "ban": ("好物が毒になるのはどれか。", "好物を避けるべきなのはどの日か。"),
        "banned": ("{o}の日に毒になる餌はどれか。", "{o}の日に与えてはならない餌はどれか。"),
        "not_banned": ("{o}の日に毒にならない餌はどれか。", "{o}の日にも与えてよい餌はどれか。"),
        "signs": ("{s}にある特徴はどれか。", "{s}がもつ特徴はどれか。"),
        "not_signs": ("{s}にない特徴はどれか。", "{s}の特徴でないのはどれか。"),
        "cause": ("{o}をすみかとする動物はどれか。", "{o}で暮らす動物はどれか。"),
        "highest": ("{t}の基準値が最も高い動物はどれか。", "大人の{t}が最も高いのはどれか。"),
        "dose": (
            "体重{v}kgの{s}に好物を与える。1日量は何粒か。整数で答えよ。",
            "体重{v}kgの{s}がいる。好物の1日量（粒）を整数で求めよ。",
        ),
    },
)
