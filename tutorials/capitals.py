"""Countries and their capitals: what lesson 113 asks a language model."""

from __future__ import annotations

# Cut short where spellings differ behind it: Brasília, Yaoundé.
CAPITALS = {
    "Afghanistan": "Kabul", "Algeria": "Algiers", "Angola": "Luanda", "Argentina": "Buenos Aires",
    "Armenia": "Yerevan", "Australia": "Canberra", "Austria": "Vienna", "Azerbaijan": "Baku",
    "Bahrain": "Manama", "Bangladesh": "Dhaka", "Belarus": "Minsk", "Belgium": "Brussels",
    "Bolivia": "La Paz", "Botswana": "Gaborone", "Brazil": "Bras", "Bulgaria": "Sofia",
    "Cambodia": "Phnom Penh", "Cameroon": "Yaound", "Canada": "Ottawa", "Chad": "Djamena",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogot", "Croatia": "Zagreb",
    "Cuba": "Havana", "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo",
    "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Fiji": "Suva", "Finland": "Helsinki",
    "France": "Paris", "Gabon": "Libreville", "Georgia": "Tbilisi", "Germany": "Berlin",
    "Ghana": "Accra", "Greece": "Athens", "Guatemala": "Guatemala City", "Guyana": "Georgetown",
    "Haiti": "Port-au-Prince", "Honduras": "Tegucigalpa", "Hungary": "Budapest",
    "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Israel": "Jerusalem", "Italy": "Rome",
    "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kazakhstan": "Astana",
    "Kenya": "Nairobi", "Kuwait": "Kuwait City", "Kyrgyzstan": "Bishkek", "Laos": "Vientiane",
    "Latvia": "Riga", "Lebanon": "Beirut", "Liberia": "Monrovia", "Libya": "Tripoli",
    "Lithuania": "Vilnius", "Madagascar": "Antananarivo", "Malaysia": "Kuala Lumpur",
    "Mali": "Bamako", "Mexico": "Mexico City", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat",
    "Mozambique": "Maputo", "Namibia": "Windhoek", "Nepal": "Kathmandu",
    "Netherlands": "Amsterdam", "Nicaragua": "Managua", "Niger": "Niamey", "Nigeria": "Abuja",
    "Norway": "Oslo", "Oman": "Muscat", "Pakistan": "Islamabad", "Paraguay": "Asunci",
    "Peru": "Lima", "Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow", "Rwanda": "Kigali",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana",
    "Somalia": "Mogadishu", "Spain": "Madrid", "Sudan": "Khartoum", "Suriname": "Paramaribo",
    "Sweden": "Stockholm", "Switzerland": "Bern", "Syria": "Damascus", "Tajikistan": "Dushanbe",
    "Tanzania": "Dodoma", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Turkmenistan": "Ashgabat", "Uganda": "Kampala", "Uruguay": "Montevideo",
    "Uzbekistan": "Tashkent", "Venezuela": "Caracas", "Vietnam": "Hanoi", "Yemen": "Sana",
    "Zambia": "Lusaka", "Zimbabwe": "Harare",
}  # fmt: skip


def is_right(country: str, answer: str) -> bool:
    """Tell whether an answer names the country's capital."""
    return CAPITALS[country].lower() in answer.lower()
