from hpt_hf.cost import main

if __name__ == "__main__":
    main()
