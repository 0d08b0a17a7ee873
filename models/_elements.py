"""The chemical elements."""

# Name, symbol and atomic mass, in order of atomic number. Masses are the abridged
# standard atomic weights of IUPAC; for an element without one, the mass number of its
# longest-lived known isotope.
_TABLE = """
hydrogen H 1.008|helium He 4.0026|lithium Li 6.94|beryllium Be 9.0122|boron B 10.81
carbon C 12.011|nitrogen N 14.007|oxygen O 15.999|fluorine F 18.998|neon Ne 20.180
sodium Na 22.990|magnesium Mg 24.305|aluminium Al 26.982|silicon Si 28.085
phosphorus P 30.974|sulfur S 32.06|chlorine Cl 35.45|argon Ar 39.95
potassium K 39.098|calcium Ca 40.078|scandium Sc 44.956|titanium Ti 47.867
vanadium V 50.942|chromium Cr 51.996|manganese Mn 54.938|iron Fe 55.845
cobalt Co 58.933|nickel Ni 58.693|copper Cu 63.546|zinc Zn 65.38|gallium Ga 69.723
germanium Ge 72.630|arsenic As 74.922|selenium Se 78.971|bromine Br 79.904
krypton Kr 83.798|rubidium Rb 85.468|strontium Sr 87.62|yttrium Y 88.906
zirconium Zr 91.224|niobium Nb 92.906|molybdenum Mo 95.95|technetium Tc 97
ruthenium Ru 101.07|rhodium Rh 102.91|palladium Pd 106.42|silver Ag 107.87
cadmium Cd 112.41|indium In 114.82|tin Sn 118.71|antimony Sb 121.76
tellurium Te 127.60|iodine I 126.90|xenon Xe 131.29|caesium Cs 132.91
barium Ba 137.33|lanthanum La 138.91|cerium Ce 140.12|praseodymium Pr 140.91
neodymium Nd 144.24|promethium Pm 145|samarium Sm 150.36|europium Eu 151.96
gadolinium Gd 157.25|terbium Tb 158.93|dysprosium Dy 162.50|holmium Ho 164.93
erbium Er 167.26|thulium Tm 168.93|ytterbium Yb 173.05|lutetium Lu 174.97
hafnium Hf 178.49|tantalum Ta 180.95|tungsten W 183.84|rhenium Re 186.21
osmium Os 190.23|iridium Ir 192.22|platinum Pt 195.08|gold Au 196.97
mercury Hg 200.59|thallium Tl 204.38|lead Pb 207.2|bismuth Bi 208.98
polonium Po 209|astatine At 210|radon Rn 222|francium Fr 223|radium Ra 226
actinium Ac 227|thorium Th 232.04|protactinium Pa 231.04|uranium U 238.03
neptunium Np 237|plutonium Pu 244|americium Am 243|curium Cm 247|berkelium Bk 247
californium Cf 251|einsteinium Es 252|fermium Fm 257|mendelevium Md 258
nobelium No 259|lawrencium Lr 262|rutherfordium Rf 267|dubnium Db 268
seaborgium Sg 269|bohrium Bh 270|hassium Hs 269|meitnerium Mt 277
darmstadtium Ds 281|roentgenium Rg 282|copernicium Cn 285|nihonium Nh 286
flerovium Fl 290|moscovium Mc 290|livermorium Lv 293|tennessine Ts 294
oganesson Og 294
"""
_FIELDS = ("name", "symbol", "mass")

ELEMENTS: tuple[dict[str, str], ...] = tuple(
    {**dict(zip(_FIELDS, entry.split(), strict=True)), "number": str(number)}
    for number, entry in enumerate(_TABLE.strip().replace("\n", "|").split("|"), start=1)
)
